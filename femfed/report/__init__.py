"""What a run tells and leaves behind: tables, TensorBoard events, plots, the progress display.

Import from the modules: `plots` loads matplotlib, which takes half a second, so nothing here does.
"""
