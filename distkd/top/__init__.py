"""`distkd top`: a training as it goes, from the files of its run folder; nothing is written there, no torch."""
