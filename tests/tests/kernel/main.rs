//! The suite `kernel`: the BPF programs as the kernel runs them (`BPF_PROG_TEST_RUN`). It sees the kernel's verifier,
//! maps and packet bytes, but neither devices nor sockets, and needs root.

mod equivalence;
