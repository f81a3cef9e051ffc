"""The environment behind the interfaces of other libraries, each in a module named after it, with its own extra."""
