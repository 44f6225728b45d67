"""How good one answer is: a sequence classifier, a function of somebody's, scores that somebody computed."""
