"""Pictures, drawn from plain numbers handed in; nothing here knows of runs or models."""
