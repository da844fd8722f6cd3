"""Which kind of lease a store has: files on a filesystem, claims in object storage."""

from actors.score_store.leases import LEASE_SECONDS, FileLeases, HeldLeases
from actors.storage.folder import DiskFolder, Folder


def open_leases(folder: Folder, lease_seconds: float = LEASE_SECONDS) -> HeldLeases:
    """Return the leases of a job on the shards of the store in a folder."""
    if isinstance(folder, DiskFolder):
        return FileLeases(folder.path, lease_seconds)
    from actors.score_store.object_leases import ObjectLeases  # loads a cloud's library
    from actors.storage.object_folder import ObjectFolder

    assert isinstance(folder, ObjectFolder), f"there is no other kind of folder: {folder}"
    return ObjectLeases(folder, lease_seconds)
