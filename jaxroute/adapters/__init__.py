"""The environment behind the interfaces of other libraries: a module for each, named after it, with its own extra."""
