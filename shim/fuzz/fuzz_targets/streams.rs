#![no_main]
#![allow(missing_docs, reason = "see husk_fuzz::TARGETS")]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| husk_shim::fuzz::streams(bytes));
