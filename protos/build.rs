//! Generates the messages and the async TTRPC stubs from `proto/*.proto`.

use std::error::Error;
use std::path::{Path, PathBuf};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

/// Files that define a service.
const SERVICES: [&str; 8] = [
    "proto/system.proto",
    "proto/bundle.proto",
    "proto/stdio.proto",
    "proto/events.proto",
    "proto/metadata.proto",
    "proto/debug.proto",
    "proto/network.proto",
    "proto/disks.proto",
];
/// Files that define only messages.
const MESSAGES: [&str; 5] = [
    "proto/runc_options.proto",
    "proto/runtime_options.proto",
    "proto/report.proto",
    "proto/cri.proto",
    "proto/sandbox_update.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    Codegen::new()
        .inputs(SERVICES.iter().chain(&MESSAGES))
        .include("proto")
        .out_dir(&out)
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
        .customize(Customize { async_all: true, ..Default::default() })
        .run()?;

    // The generated mod.rs lists only the messages. The stubs start with inner attributes, so each must be a module in
    // its own file as well.
    let mut modules = std::fs::read_to_string(out.join("mod.rs"))?;
    for file in SERVICES {
        let name = Path::new(file).file_stem().and_then(|stem| stem.to_str()).ok_or("a .proto file without a name")?;
        modules.push_str(&format!("pub mod {name}_ttrpc;\n"));
    }
    std::fs::write(out.join("mod.rs"), modules)?;
    Ok(())
}
