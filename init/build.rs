//! Links the guest's init so that it is small: its relocations packed, where its C library can unpack them.

fn main() {
    println!("cargo:rerun-if-env-changed=HUSK_PACK_RELOCATIONS");
    // init/musl/cargo knows which musl it is: 1.2.4 is the first that reads them (DT_RELR).
    if std::env::var("HUSK_PACK_RELOCATIONS").is_ok_and(|wanted| wanted == "1") {
        println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}
