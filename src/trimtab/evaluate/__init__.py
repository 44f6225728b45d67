"""Is the aligned model better, by how much, and how sure are we?"""
