# SPDX-License-Identifier: GPL-2.0
"""The benchmarks: instruction counts, scaling, fio from end to end."""
