//! Makes the shared object of `fourtuple run` out of crates/preload, for maturin to put beside the Python modules.
//!
//! Cargo cannot make a shared object with settings of its own on the way to another one: this one is without the
//! standard library, so that it needs nothing but libc in whatever program it is loaded into, and so has to abort where
//! the rest unwinds. Hence a cargo inside cargo, with a target folder of its own.

use std::env;
use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let target = env::var("TARGET")?;
    let folder = out.join("preload");
    println!("cargo::rerun-if-changed=../preload");
    let status = Command::new(env::var("CARGO")?)
        .args(["rustc", "--quiet", "--release", "--lib", "--crate-type", "cdylib"])
        .args(["--manifest-path", "../preload/Cargo.toml", "--target", &target])
        .args(["--config", "profile.release.panic='abort'", "--config", "profile.release.strip=true"])
        .args(["--config", "profile.release.lto='fat'", "--config", "profile.release.codegen-units=1"])
        .arg("--target-dir")
        .arg(&folder)
        // pthread_cancel() unwinds through our frames, on every architecture.
        .args(["--", "-Cforce-unwind-tables=yes"])
        // musl's targets make static programs unless told, which have no shared objects; maturin tells them the same.
        .args(target.contains("musl").then_some("-Ctarget-feature=-crt-static"))
        // Set by `cargo clippy`, which would check and make nothing.
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .status()?;
    if !status.success() {
        return Err(format!("crates/preload could not be built ({status})").into());
    }
    let name = "libfourtuple_preload.so";
    fs::copy(folder.join(target).join("release").join(name), out.join(name))?;
    Ok(())
}
