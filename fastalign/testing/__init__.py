"""Inputs and error bounds shared by tests/ and benchmarks/."""

from fastalign.testing.accuracy import assert_as_accurate as assert_as_accurate
from fastalign.testing.accuracy import assert_matches_reference as assert_matches_reference
from fastalign.testing.accuracy import cotangent_like as cotangent_like
from fastalign.testing.accuracy import relative_error as relative_error
from fastalign.testing.accuracy import value_and_grads as value_and_grads
from fastalign.testing.cases import Case as Case
from fastalign.testing.cases import cases as cases
