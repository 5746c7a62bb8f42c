"""SKIM weights: fit, allocate, scale, refine and pack one compressed linear."""
