"""What must survive a restart of the control plane; all else is rebuilt from the world."""

from controlplane.store.stores import FileStore, MemoryStore, Store
from controlplane.store.values import Persisted, StoredControl, StoredLease, StoredPolicy

__all__ = ["FileStore", "MemoryStore", "Persisted", "Store", "StoredControl", "StoredLease", "StoredPolicy"]
