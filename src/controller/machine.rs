//! The metadata as the state machine of group 0: applies what is committed and publishes the image.
//!
//! Owns the sending side of the image's watch, whose value *is* the state: a command changes it in place, and copies it only
//! when somebody still holds the image before. Decides nothing.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::watch;

use crate::raft::StateMachine;
use crate::types::{DecodeError, EntryId, Error, encode};

use super::metadata::{ClusterMetadata, Command};

/// Commands between two checkpoints.
const CHECKPOINT_COMMANDS: u64 = 1_000;

/// Group 0's state machine, see [`machine`].
#[derive(Debug)]
pub struct MetadataMachine {
    image: watch::Sender<Arc<ClusterMetadata>>,
    since_checkpoint: u64,
}

/// The state machine to start group 0 with, and the image it publishes.
pub fn machine() -> (MetadataMachine, watch::Receiver<Arc<ClusterMetadata>>) {
    let (image, images) = watch::channel(Arc::default());
    (
        MetadataMachine {
            image,
            since_checkpoint: 0,
        },
        images,
    )
}

impl StateMachine for MetadataMachine {
    fn apply(&mut self, id: EntryId, command: &Bytes) -> Bytes {
        self.since_checkpoint += 1;
        let command = match Command::from_bytes(command) {
            Ok(command) => command,
            // Leaving out a committed command would make this copy differ from the others for good. The broker cannot go
            // on until it runs a version that reads the command.
            #[allow(clippy::panic)]
            Err(error) => panic!("cannot read the controller's command {id}: {error}"),
        };
        let mut answer = Err(Error::ControllerUnavailable);
        self.image.send_if_modified(|image| {
            answer = Arc::make_mut(image).apply(id.index, command);
            answer.is_ok()
        });
        encode(&answer).into()
    }

    fn wants_checkpoint(&self) -> bool {
        self.since_checkpoint >= CHECKPOINT_COMMANDS
    }

    fn checkpoint(&mut self) -> (Bytes, Vec<(u64, Bytes)>) {
        self.since_checkpoint = 0;
        (self.image.borrow().to_bytes().into(), Vec::new())
    }

    fn restore(&mut self, state: Option<&Bytes>) -> Result<(), DecodeError> {
        let restored = match state {
            Some(bytes) => ClusterMetadata::from_bytes(bytes)?,
            None => ClusterMetadata::default(),
        };
        self.since_checkpoint = 0;
        self.image.send_replace(Arc::new(restored));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::metadata::Answer;
    use crate::types::{ClusterId, LeaderEpoch, LogIndex, decode};

    fn entry(index: u64) -> EntryId {
        EntryId {
            epoch: LeaderEpoch(1),
            index: LogIndex(index),
        }
    }

    fn apply(
        machine: &mut MetadataMachine,
        index: u64,
        command: &Command,
    ) -> Result<Answer, Error> {
        decode(&machine.apply(entry(index), &command.to_bytes().into())).unwrap()
    }

    /// Goal: an image somebody holds never changes under it, and what is applied is seen at once. Method: hold the image
    /// before a command, compare both after it; a refused command wakes nobody.
    #[test]
    fn held_images_stay_and_changes_are_published() {
        let (mut machine, mut images) = machine();
        let before = images.borrow_and_update().clone();
        let early = apply(&mut machine, 1, &Command::AllocateProducerId);
        assert_eq!(early, Err(Error::ControllerUnavailable));
        assert!(!images.has_changed().unwrap());
        let init = Command::InitCluster {
            cluster: ClusterId(7),
        };
        assert_eq!(
            apply(&mut machine, 2, &init),
            Ok(Answer::Cluster(ClusterId(7)))
        );
        assert!(images.has_changed().unwrap());
        assert_eq!(before.cluster(), None);
        assert_eq!(images.borrow().cluster(), Some(ClusterId(7)));
    }

    /// Goal: a replica restored from a checkpoint equals one that applied everything. Method: checkpoint one machine,
    /// restore another from it, compare images and the next answers.
    #[test]
    fn a_checkpoint_restores_the_same_state() {
        let (mut first, images) = machine();
        apply(
            &mut first,
            1,
            &Command::InitCluster {
                cluster: ClusterId(7),
            },
        )
        .unwrap();
        apply(&mut first, 2, &Command::AllocateProducerId).unwrap();
        let (state, blocks) = first.checkpoint();
        assert!(blocks.is_empty());
        let (mut second, restored) = machine();
        second.restore(Some(&state)).unwrap();
        assert_eq!(*images.borrow(), *restored.borrow());
        let next = Command::AllocateProducerId;
        assert_eq!(apply(&mut first, 3, &next), apply(&mut second, 3, &next));
        assert!(second.restore(Some(&Bytes::from_static(b"\x09"))).is_err());
        second.restore(None).unwrap();
        assert_eq!(**restored.borrow(), ClusterMetadata::default());
    }

    /// Goal: checkpoints are asked for every so many commands. Method: count.
    #[test]
    fn checkpoints_are_wanted_every_thousand_commands() {
        let (mut machine, _images) = machine();
        for index in 1..CHECKPOINT_COMMANDS {
            apply(&mut machine, index, &Command::AllocateProducerId).ok(); // refused ones count as well
            assert!(!machine.wants_checkpoint());
        }
        apply(&mut machine, 1_000, &Command::AllocateProducerId).ok(); // as above
        assert!(machine.wants_checkpoint());
        machine.checkpoint();
        assert!(!machine.wants_checkpoint());
    }
}
