//! A container's files on their way into the guest: what its spec says about them ([`spec`]), and the folder that
//! virtiofsd serves ([`share`]).

pub mod mount;
pub mod share;
pub mod spec;
