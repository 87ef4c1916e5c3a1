"""Loop nests written out, for what TVM's own operators lack: packed codes, block-sparse weights, recurrent layers.

Each function here makes one ``PrimFunc`` that no schedule, tuner or fusion touches.
"""
