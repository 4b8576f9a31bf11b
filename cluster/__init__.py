"""Where a job runs: host file examples, and a cluster of several hosts emulated on one machine for tests."""
