//! The judge is judged: clean histories pass, every kind of damage is found and named, a slow and simple judge agrees.
//!
//! - `live`: a cluster in this process, hurt while the workload runs.

mod live;
