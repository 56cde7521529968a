"""`kit eject`: the plain TRL script, ds_config.json and run.sh that do what a plan does, without the kit.

Every plan key is written out, or the plan is refused with the reason: nothing is dropped in silence. What the script
does stands beside it in kit/training/run.py, kit/models/load.py and kit/data/load.py.
"""
