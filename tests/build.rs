//! Sets the configuration `runc` when the tests are built for runc: tests about VMs are then ignored, and counted as such.

fn main() {
    println!("cargo:rustc-check-cfg=cfg(runc)");
    println!("cargo:rerun-if-env-changed=HUSK_TEST_RUNTIME");
    if std::env::var("HUSK_TEST_RUNTIME").is_ok_and(|runtime| runtime == "runc") {
        println!("cargo:rustc-cfg=runc");
    }
}
