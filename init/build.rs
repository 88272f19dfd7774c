//! Links the guest's init with packed relocations, which make it smaller, if its C library can unpack them.

fn main() {
    println!("cargo:rerun-if-env-changed=HUSK_PACK_RELOCATIONS");
    // init/musl/cargo sets this for musl 1.2.4 and later, which read packed relocations (DT_RELR).
    if std::env::var("HUSK_PACK_RELOCATIONS").is_ok_and(|value| value == "1") {
        println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}
