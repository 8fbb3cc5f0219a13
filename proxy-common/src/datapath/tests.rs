//! The datapath against tables made of ordered maps.
