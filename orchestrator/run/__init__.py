"""A run: its folder, its stages in order, what each makes; no page is written here, and no search."""
