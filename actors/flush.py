"""What an interrupted driver waits for before it goes on with its end."""

FLUSH_SECONDS = 10.0
"""How long the coordinator or the training workers may record what is done of a stage. Well within the seconds after
which an interrupted process is ended (`launch.signals.GRACE`)."""
