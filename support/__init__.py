"""What a research script needs from the machine: command line, files, checkpoints, devices.

May import only `config`.
"""
