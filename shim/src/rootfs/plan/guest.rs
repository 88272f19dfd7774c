//! Roots that consist of disks.

use std::path::PathBuf;

use nix::mount::MsFlags;

use super::options::{Format, NewFolder, is_contained, is_known};
use super::part::{Kind, MARK, Part};
use super::root::{GuestRoot, Place, RootDisk, Top};
use super::view::HostView;
use crate::config::problem::Problem;
use crate::config::verity::Verity;
use crate::rootfs::mount::parse_options;

/// The folders of an overlay.
const LOWER: &str = "lowerdir=";
const UPPER: &str = "upperdir=";
const WORK: &str = "workdir=";
/// The option of a layer about its hash tree, and what the name of the file with its metadata ends with (containerd's
/// internal/dmverity).
const VERITY: &str = "X-containerd.dmverity=";
const VERITY_SUFFIX: &str = ".dmverity";

/// A number in the list of disks for each of containerd's mounts.
type Disks = Vec<Option<usize>>;

/// The root of mounts at least one of which is a disk. The last mount is the root; it refers to the earlier ones.
pub(super) fn root(parts: Vec<Part>, view: &HostView<'_>) -> Result<GuestRoot, Problem> {
    let mut disks = Vec::new();
    let mut numbers: Disks = Vec::new();
    let mut folders = Vec::new();
    // The images of loop mounts that have to be created.
    let mut formats: Vec<(PathBuf, Format)> = Vec::new();
    let mut top = None;
    let last = parts.len().saturating_sub(1);
    for part in parts {
        folders.extend(new_folders(&part, &numbers)?);
        let number = part.is_disk().then_some(disks.len());
        let is_last = part.index == last;
        match part.kind {
            Kind::Disk => {
                let mut disk = disk(part, view)?;
                if disk.format.is_none() {
                    let of_image = formats.iter().find(|(image, _)| *image == disk.image);
                    disk.format = of_image.map(|(_, format)| format.clone());
                }
                if is_last {
                    let place = Place { disk: disks.len(), path: String::new() };
                    // The filesystem has the flags.
                    top = Some(Top::Folder { place, flags: MsFlags::empty() });
                }
                disks.push(disk);
            }
            Kind::Loop if !is_last => {
                formats.extend(part.format.map(|format| (PathBuf::from(part.source), format)));
            }
            Kind::Bind if is_last => top = Some(bound(&part, &numbers)?),
            Kind::Other if is_last && part.fs_type == "overlay" => top = Some(overlay(&part, &numbers)?),
            Kind::Loop | Kind::Bind | Kind::Other => {
                let why =
                    "in a root that consists of disks, only disks and then one overlay or bind mount are supported";
                return Err(part.problem("type", &part.fs_type, why));
            }
        }
        numbers.push(number);
    }
    match top {
        Some(top) => Ok(GuestRoot { disks, folders, top }),
        None => Err(Problem { key: "rootfs".into(), value: None, why: "no mount is the root".into() }),
    }
}

/// Parses the options that all filesystems have, and checks the others.
fn options(part: &Part, options: &[String]) -> Result<(MsFlags, Vec<String>), Problem> {
    // The guest's disk is what a loop device would be.
    let options: Vec<String> = options.iter().filter(|option| *option != "loop").cloned().collect();
    let parsed = parse_options(&options)
        .map_err(|option| part.problem("options", option, "is not supported for a container's root"))?;
    match parsed.data.iter().find(|option| !is_known(&part.fs_type, option)) {
        Some(option) => {
            let why = format!("is not supported for {} in the guest", part.fs_type);
            Err(part.problem("options", option, why))
        }
        None => Ok((parsed.flags, parsed.data)),
    }
}

fn disk(mut part: Part, view: &HostView<'_>) -> Result<RootDisk, Problem> {
    let image = PathBuf::from(&part.source);
    if !image.is_absolute() {
        return Err(part.problem("source", &part.source, "is not the absolute path of an image or a device"));
    }
    let is_erofs = part.fs_type == "erofs";
    let verity = if is_erofs { verity(&mut part, view)? } else { None };
    let (mut flags, data) = options(&part, &part.options)?;
    if is_erofs {
        flags |= MsFlags::MS_RDONLY;
    }
    Ok(RootDisk { image, fs_type: part.fs_type, flags, data: data.join(","), format: part.format, verity })
}

/// The hash tree of a layer. containerd's option names the file with its metadata or says whether there is one, which is
/// beside the layer then.
fn verity(part: &mut Part, view: &HostView<'_>) -> Result<Option<Verity>, Problem> {
    let option = part.options.extract_if(.., |option| option.starts_with(VERITY)).last();
    let mode = option.as_deref().map_or("auto", |option| &option[VERITY.len()..]);
    let metadata = match mode {
        "off" => return Ok(None),
        "auto" | "on" => PathBuf::from(format!("{}{VERITY_SUFFIX}", part.source)),
        path if path.starts_with('/') => PathBuf::from(path),
        _ => {
            let why = "must be auto, on, off, or the absolute path of a file with metadata";
            return Err(part.problem("options", option.as_deref().unwrap_or_default(), why));
        }
    };
    let problem = |why: &str| {
        let layer = part.source.as_str();
        option
            .as_deref()
            .map_or_else(|| part.problem("source", layer, why), |option| part.problem("options", option, why))
    };
    match (view.verity)(&metadata) {
        Ok(None) if mode != "auto" => Err(problem(&format!("there is no {}", metadata.display()))),
        Ok(verity) => Ok(verity),
        Err(why) => Err(problem(&why)),
    }
}

fn bound(part: &Part, numbers: &Disks) -> Result<Top, Problem> {
    let given: Vec<String> = part.options.iter().filter(|o| !matches!(o.as_str(), "bind" | "rbind")).cloned().collect();
    let (flags, _) = options(part, &given)?;
    let place = place(&part.source, numbers).map_err(|why| part.problem("source", &shown(&part.source), why))?;
    Ok(Top::Folder { place, flags })
}

fn overlay(part: &Part, numbers: &Disks) -> Result<Top, Problem> {
    let (mut lower, mut upper, mut work) = (Vec::new(), None, None);
    let mut others = Vec::new();
    for option in &part.options {
        let place = |path: &str| place(path, numbers).map_err(|why| part.problem("options", &shown(option), why));
        if let Some(layers) = option.strip_prefix(LOWER) {
            lower = layers.split(':').map(place).collect::<Result<Vec<_>, _>>()?;
        } else if let Some(path) = option.strip_prefix(UPPER) {
            upper = Some(place(path)?);
        } else if let Some(path) = option.strip_prefix(WORK) {
            work = Some(place(path)?);
        } else {
            others.push(option.clone());
        }
    }
    let (flags, data) = options(part, &others)?;
    match (upper, work) {
        _ if lower.is_empty() => Err(part.problem("options", "", "lowerdir is missing")),
        (Some(upper), Some(work)) => Ok(Top::Overlay { lower, upper: Some((upper, work)), flags, data }),
        (None, None) => Ok(Top::Overlay { lower, upper: None, flags, data }),
        _ => Err(part.problem("options", "", "upperdir and workdir belong together")),
    }
}

fn new_folders(part: &Part, numbers: &Disks) -> Result<Vec<NewFolder<Place>>, Problem> {
    let folder = |folder: &NewFolder<String>| {
        let place = place(&folder.place, numbers).map_err(|why| part.problem("options", &shown(&folder.place), why))?;
        Ok(NewFolder { place, mode: folder.mode, owner: folder.owner })
    };
    part.folders.iter().map(folder).collect()
}

/// A folder in an expanded text.
fn place(text: &str, numbers: &Disks) -> Result<Place, &'static str> {
    let of_host = "is a folder of the host, which cannot be a part of a root that consists of disks: with containerd's \
        erofs snapshotter, set default_size, so that it uses a disk for changes";
    let (number, path) = text.strip_prefix(MARK).and_then(|text| text.split_once(MARK)).ok_or(of_host)?;
    let disk = number.parse().ok().and_then(|number: usize| *numbers.get(number)?).ok_or("is not on a disk")?;
    let path = path.trim_start_matches('/');
    match is_contained(path) {
        true => Ok(Place { disk, path: path.to_owned() }),
        false => Err("leads out of the disk"),
    }
}

/// An expanded text as it was written.
fn shown(text: &str) -> String {
    let mut shown = String::new();
    for (index, piece) in text.split(MARK).enumerate() {
        // Every second piece is a number.
        match index % 2 {
            0 => shown.push_str(piece),
            _ => shown.push_str(&format!("{{{{ mount {piece} }}}}")),
        }
    }
    shown
}
