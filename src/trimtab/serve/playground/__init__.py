"""The playground at `/playground`: two answers side by side, and a blind arena whose votes train an aligner."""
