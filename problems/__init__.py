"""One file per method: its formula, its composition, its published recipe. Each runs:

python -m bilevel_at.run problems/fastbat.py
"""
