"""Folders on a disk or in object storage, read and written alike; what stands in them is not known here."""
