"""Constants of earlier versions: what became of each, by script. Its option and its name in the file say so.

The values of earlier checkpoints are read by `common.run_folder`.
"""

RENAMED = {}
