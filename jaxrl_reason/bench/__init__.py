"""The standard workloads, and what it takes to time them here and beside other libraries."""
