//! Finds the BPF object that the agent embeds, and tells the crate where it is by `env!("VIPR_EBPF_OBJECT")`.
//!
//! The object is `VIPR_EBPF_OBJECT` if that is set, else `ebpf/vipr.o` in the target directory, where
//! `cargo xtask build-ebpf` puts it. It is not built here: that takes another compiler and linker.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=VIPR_EBPF_OBJECT");
    println!("cargo::rerun-if-env-changed=CARGO_TARGET_DIR");
    let object = object();
    // A missing file counts as changed, so that the next build looks again.
    println!("cargo::rerun-if-changed={}", object.display());
    if object.is_file() {
        println!("cargo::rustc-env=VIPR_EBPF_OBJECT={}", object.display());
    } else {
        println!(
            "cargo::error=the BPF object {} is missing: run `cargo xtask build-ebpf` first",
            object.display()
        );
    }
}

/// The object's absolute path; relative ones are relative to the workspace.
fn object() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let workspace = package.parent().unwrap_or(package);
    let variable = |name| env::var_os(name).filter(|value| !value.is_empty());
    match variable("VIPR_EBPF_OBJECT") {
        Some(object) => workspace.join(object),
        None => {
            let target = variable("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
            workspace.join(target).join("ebpf/vipr.o")
        }
    }
}
