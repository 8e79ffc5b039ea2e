//! The promises, shown on the whole system: brokers as processes, the command line, brokers inside this process.
//!
//! One program for all of it: it is linked once, and while a long test waits for its processes others have the machine.
//!
//! - [`cluster`]: processes that are killed, restarted, given wrong directories, and moved between.
//! - [`durability`]: their disks. [`cli`]: the command line. [`embedded`]: the library as a service uses it.
//! - [`support`]: the harness for processes. [`harness`]: what proves it.

mod cli;
mod cluster;
mod durability;
mod embedded;
mod harness;
mod support;
