"""Weights of other projects into our checkpoints, and ours into forms that others read.

`importing.import_checkpoint` and `exporting.export_network` are what the rest of the project calls.
"""
