"""From a folder as users have it to one memory map of slices; also makes the embedded set.

May import only `config` and `support`.
"""
