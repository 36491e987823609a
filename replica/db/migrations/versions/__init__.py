"""One file a step. A step imports nothing of ours: it must do the same in five years, whatever the tables are then."""
