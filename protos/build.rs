//! Generates the messages and the async TTRPC stubs from `proto/*.proto`.

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

const FILES: [&str; 6] = [
    "proto/system.proto",
    "proto/bundle.proto",
    "proto/stdio.proto",
    "proto/events.proto",
    "proto/metadata.proto",
    "proto/debug.proto",
];
/// Without a service.
const MESSAGES: [&str; 2] = ["proto/runc_options.proto", "proto/report.proto"];

fn main() {
    println!("cargo:rerun-if-changed=proto");
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    Codegen::new()
        .inputs(FILES.iter().chain(&MESSAGES))
        .include("proto")
        .out_dir(&out)
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
        .customize(Customize { async_all: true, ..Default::default() })
        .run()
        .expect("generate code from proto/");

    // The generator's mod.rs knows the messages only; the stubs, which begin with inner attributes, have to be modules of files too.
    let mut modules = std::fs::read_to_string(out.join("mod.rs")).expect("read the generated mod.rs");
    for file in FILES {
        let name = std::path::Path::new(file).file_stem().and_then(|stem| stem.to_str()).expect("a proto file's name");
        modules.push_str(&format!("pub mod {name}_ttrpc;\n"));
    }
    std::fs::write(out.join("mod.rs"), modules).expect("write the generated mod.rs");
}
