//! Replays every input of the corpora.

#![allow(clippy::expect_used, reason = "a failed expectation fails the test")]

use std::fs;
use std::path::Path;

#[test]
fn no_input_of_the_corpora_shows_a_fault() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (target, run) in husk_fuzz::TARGETS {
        let folder = corpora.join(target);
        let inputs = fs::read_dir(&folder).unwrap_or_else(|error| panic!("read {}: {error}", folder.display()));
        let mut replayed = 0;
        for input in inputs {
            let path = input.expect("an entry").path();
            // The name of an input that shows a fault is the last line before the panic.
            eprintln!("{}", path.display());
            run(&fs::read(&path).expect("an input"));
            replayed += 1;
        }
        assert!(replayed > 0, "{} is empty", folder.display());
    }
    let folders = fs::read_dir(&corpora).expect("the corpora").count();
    assert_eq!(folders, husk_fuzz::TARGETS.len(), "a corpus without a target");
}
