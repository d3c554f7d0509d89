"""Engine profiles, built-in and user-supplied: the one source of engine speed for every room."""

from twofold.profiles.catalogue import ProfileError, get, load_profiles, names, resolve

__all__ = ["ProfileError", "get", "load_profiles", "names", "resolve"]
