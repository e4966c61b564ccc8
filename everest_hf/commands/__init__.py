"""The commands of everest-hf, a file each: its arguments, what it checks first, and what it prints.

`add_parser` of a file adds the command to the command line. What a command does is done by the other packages, which its
`run` imports when it is called.
"""
