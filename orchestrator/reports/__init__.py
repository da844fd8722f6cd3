"""Pages for people, made from a run's folder alone; nothing here decides or measures."""
