//! sim: a seeded carrier with a virtual clock and a virtual network.
