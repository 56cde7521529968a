"""`kit doctor`: what on this machine would stop a run or change it silently, and what ended a run that failed.

Nothing here imports torch or asks the network. Each check takes the paths and the environment that it looks at as
arguments, tolerates what is missing or forbidden, and gives findings: a level, what was looked at, what was found, the
fix.
"""
