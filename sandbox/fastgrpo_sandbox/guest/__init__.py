"""The part that runs inside the jail: standard library, msgspec and the native module only."""
