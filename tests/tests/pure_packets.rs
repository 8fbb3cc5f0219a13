//! The packet edge on the host: single packets through the pipeline, against ordered maps.
//!
//! Whatever comes out is compared with a packet that was written for the purpose, byte for byte, or read with every
//! checksum verified.

#[cfg(test)]
mod packets;
