"""`trimtab evolve`: an aligner that improves from use, round after round, and never to something worse.

votes.py      what people said, as votes for one of two answers
sift.py       from votes to training pairs with weights: repeats, contradictions, floods, length
trigger.py    whether enough has come, or changed, for a round
expand.py     more pairs, on prompts like those that the incumbent lost
gate.py       whether the new aligner is better than the incumbent
stages.py     one round, from votes to a verdict
folder.py     what a loop's folder holds: its rounds, its history, the link to the aligner in service
run.py        all of it, in order;  page.py  the curve of rounds
"""
