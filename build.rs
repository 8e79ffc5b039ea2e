//! Compiles the library that is preloaded into brokers to hurt their disks (`faultfs/`), for the builds that carry it.
//!
//! Owns the way it gets into the program: the library is one more crate type of one source file without dependencies, which Cargo
//! cannot build beside a package's own library. Where it cannot exist, what is embedded is empty, and says so when it is asked for.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=faultfs/src");
    let variable = |name: &str| env::var(name).unwrap_or_default();
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("faultfs.so");
    let wanted = env::var_os("CARGO_FEATURE_TESTKIT").is_some();
    let possible = variable("CARGO_CFG_TARGET_OS") == "linux"
        && variable("CARGO_CFG_TARGET_ENV") == "gnu"
        && variable("CARGO_CFG_TARGET_POINTER_WIDTH") == "64"
        && variable("CARGO_CFG_TARGET_ENDIAN") == "little";
    if wanted && possible {
        let mut compile = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
        compile
            .args(["--edition", "2024", "--crate-type", "cdylib"])
            .args([
                "--crate-name",
                "faultfs",
                "-O",
                "-C",
                "panic=abort",
                "-C",
                "strip=symbols",
            ])
            .args(["-D", "warnings", "--target", &variable("TARGET"), "-o"])
            .arg(&out)
            .arg("faultfs/src/lib.rs");
        if let Some(linker) = env::var_os("RUSTC_LINKER") {
            let mut option = OsString::from("linker=");
            option.push(linker);
            compile.arg("-C").arg(option);
        }
        match compile.status() {
            Ok(status) if status.success() => return,
            other => println!("cargo::warning=the fault library is left out: {other:?}"),
        }
    }
    if let Err(error) = std::fs::write(&out, b"") {
        println!("cargo::error=cannot write {}: {error}", out.display());
    }
}
