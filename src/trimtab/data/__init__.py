"""Data sets as records, chats as texts, texts as ids, records as examples: what every command reads goes through here."""
