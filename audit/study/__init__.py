"""The bound, calibrated: how far sound and unsound layers are from the reference on the same data.

layers.py     the layers that are not backends of this project
measures.py   the measures of CANN's published standards
collect.py    runs the cases on all layers and measures the results
families.py   the kinds of data, and the faults that each must show
page.py       the tables of docs/tolerances.md
"""
