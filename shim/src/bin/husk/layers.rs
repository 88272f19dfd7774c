//! `husk layers`: the images of layers that VMs share.

use std::io::{self, Write};
use std::time::SystemTime;

use anyhow::Result;
use husk_shim::config::load;
use husk_shim::disks::layers::Store;
use serde_json::{Value, json};

use crate::print::{self, duration, shown};

const TITLES: [&str; 5] = ["IMAGE", "SIZE", "USED", "VMS", "MADE FROM"];
/// How much of an image's name is shown.
const NAME: usize = 12;

pub(crate) fn run(as_json: bool) -> Result<()> {
    let config = load::load()?;
    let store = Store::new(config.layer_cache_dir, config.layer_cache_mib);
    let mut images = Vec::new();
    for image in store.images()? {
        let in_use = store.in_use(&image)?;
        images.push((image, in_use));
    }
    images.sort_by_key(|(image, _)| std::cmp::Reverse(image.used));
    let failures = store.failures()?;
    let age = |used: SystemTime| used.elapsed().unwrap_or_default().as_millis() as u64;
    let mut out = io::stdout().lock();
    if as_json {
        let image = |(image, in_use): &(husk_shim::disks::layers::store::Stored, bool)| {
            json!({
                "digest": image.digest,
                "bytes": image.stamp.bytes,
                "used_ms": age(image.used),
                "in_use": in_use,
                "layer": image.stamp.layer,
            })
        };
        let images: Vec<Value> = images.iter().map(image).collect();
        let report = json!({
            "folder": store.folder(),
            "limit_bytes": store.limit(),
            "images": images,
            "failures": failures,
        });
        return Ok(print::json(&mut out, &report)?);
    }
    let mut rows = vec![TITLES.map(str::to_owned).to_vec()];
    for (image, in_use) in &images {
        rows.push(vec![
            image.digest.chars().take(NAME).collect(),
            format!("{} MiB", image.stamp.bytes.div_ceil(1 << 20)),
            format!("{} ago", duration(age(image.used))),
            if *in_use { "yes" } else { "-" }.to_owned(),
            shown(&image.stamp.layer.to_string_lossy()),
        ]);
    }
    out.write_all(print::table(&rows).as_bytes())?;
    for failure in failures {
        writeln!(out, "no image: {}", shown(&failure))?;
    }
    Ok(())
}
