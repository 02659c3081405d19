"""Parts of makedata.py: the drawn data set, splitting by groups, and the check of a folder."""
